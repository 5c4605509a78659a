"""The stable words with which errors start, so that a client can act on them without reading prose."""

WEIGHTS = "[QE_WEIGHTS]"
LORA = "[QE_LORA]"
INPUT = "[QE_INPUT]"
MEMORY = "[QE_MEMORY]"
NAN = "[QE_NAN]"
VERSION = "[QE_VERSION]"
