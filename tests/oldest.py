"""Prints the lowest supported versions in setup.cfg as requirements for pip; `make test-oldest` installs them."""

from configparser import ConfigParser
from pathlib import Path

setup = ConfigParser()
setup.read(Path(__file__).parent.parent / "setup.cfg")
required = setup["options"]["install_requires"].split()
# The extra that the tests need.
required += [line for line in setup["options.extras_require"]["examples"].split() if line.startswith("matplotlib")]
print(*(requirement.replace(">=", "==") for requirement in required))
