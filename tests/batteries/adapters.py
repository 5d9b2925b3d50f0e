"""Whether the installed transformers adds adapters with the installed peft."""

import peft
import pytest
from packaging.version import parse
from transformers.integrations.peft import MIN_PEFT_VERSION


CAN_ADD_ADAPTERS = parse(peft.__version__) >= parse(MIN_PEFT_VERSION)

needs_add_adapter = pytest.mark.skipif(
    not CAN_ADD_ADAPTERS,
    reason=f"add_adapter of the installed transformers needs peft {MIN_PEFT_VERSION}, here is {peft.__version__}",
)
