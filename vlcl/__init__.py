"""vlcl: vision-language pretraining with the EM-augmented contrastive loss.

Importing this package is cheap: no torch. Import the module you need, e.g. `from vlcl.train import train`.
"""

__version__ = "0.1.0"
