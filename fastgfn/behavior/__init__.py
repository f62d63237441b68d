"""Which trajectories a step trains on; the settings are those of `fastgfn.config.Behavior`.

explorer.py      `Explorer`: the prompts of a step, what is drawn, replayed and kept
local_search.py  destroyed and regrown suffixes
given.py         demonstrations and label-revealing prompts
sampler.py       `sample` with the settings of the run
rows.py          rollouts joined, chosen and made of given sequences, their rewards, `drift`
"""

from fastgfn.behavior.explorer import Drawn, Explorer, Origin
from fastgfn.behavior.rows import drift

__all__ = ["Drawn", "Explorer", "Origin", "drift"]
