"""`python -m vlcl.config > docs/config.md`: the table of all settings."""

from vlcl.config import Config
from vlcl.config.docs import key_table

if __name__ == "__main__":
    print(key_table(Config), end="")
