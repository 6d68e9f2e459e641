"""What conf/ can say beyond Hydra's own: `${expanduser:~/x}` is a path in the home directory.

`dvc exp run` imports this because of `hydra.plugins_path` in .dvc/config.
"""

import os

from omegaconf import OmegaConf

OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
