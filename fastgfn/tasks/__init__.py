"""Tasks: data -> prompts, reward, metrics. No training code."""
