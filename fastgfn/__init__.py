"""GFlowNet fine-tuning of large language models: sample from intractable posteriors, fast."""

__version__ = "0.1.0"
