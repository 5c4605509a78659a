"""The stable words with which errors start, so that a client can act on them without reading prose."""

WEIGHTS = "[QE_WEIGHTS]"
LORA = "[QE_LORA]"
INPUT = "[QE_INPUT]"
NAN = "[QE_NAN]"
MEMORY = "[QE_MEMORY]"
VERSION = "[QE_VERSION]"
