"""qwen-dist: distributed fine-tuning of Qwen models on DeepSpeed.

Files directly in this package are the contract (config, arithmetic, names, errors; pydantic and the
standard library only). Its sub-packages are the runtime.
"""

__version__ = "0.1.0"
