"""Prints the lowest supported versions of setup.cfg as pip's requirements: what `make test-oldest` installs."""

from configparser import ConfigParser
from pathlib import Path

setup = ConfigParser()
setup.read(Path(__file__).parent.parent / "setup.cfg")
required = setup["options"]["install_requires"].split()
# The extras that the tests cannot do without.
required += [line for line in setup["options.extras_require"]["examples"].split() if line.startswith("matplotlib")]
print(*(requirement.replace(">=", "==") for requirement in required))
