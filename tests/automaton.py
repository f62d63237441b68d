"""A deterministic automaton over text as a grammar for `sample`: slow, obvious, and the truth of tests."""

import torch


class Automaton:
    """Accepts the texts that lead from state 0 to an accepting state, however tokens spell them.

    edges[state]: {character: next state}; every state must reach an accepting one. texts: (V,) the text of
    each token, None for one that is no text. stop: the termination token.
    """

    def __init__(self, edges, accepting, texts, stop):
        self.edges, self.accepting, self.texts, self.stop = edges, accepting, texts, stop

    def walk(self, state, text):
        """The state after the text; None where it leaves the automaton."""
        for character in text:
            state = self.edges[state].get(character)
            if state is None:
                return None
        return state

    def state(self, sequence):
        return self.walk(0, "".join(self.texts[t] for t in sequence))

    def allowed(self, sequences):
        states = [self.state(z) for z in sequences]
        rows = {state: self.row(state) for state in set(states)}
        return torch.stack([rows[state] for state in states])

    def row(self, state):
        goes_on = [bool(t) and self.walk(state, t) is not None for t in self.texts]
        goes_on[self.stop] = state in self.accepting
        return torch.tensor(goes_on)


def digits(fewest, most, texts, stop):
    """[0-9]{fewest,most}"""
    edges = {k: dict.fromkeys("0123456789", k + 1) for k in range(most)} | {most: {}}
    return Automaton(edges, range(fewest, most + 1), texts, stop)
