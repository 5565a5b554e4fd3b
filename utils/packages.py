"""Optional packages: imported where they are used, with one clear line where they are missing.

    onnx = optional_package("onnx", "--to onnx", "requirements-export.txt")
"""

from __future__ import annotations

import importlib
from types import ModuleType

from utils.errors import UserError, first_line


def optional_package(name: str, purpose: str, requirements: str) -> ModuleType:
    """Import a package that only some commands need.

    Args:
        purpose: what needs it, for the message.
        requirements: the file of this repository that installs it.

    Raises:
        UserError: if it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).split(".")[0]
        raise UserError(f"{purpose} needs the package {missing}, which is not installed: pip install -r "
                        f"{requirements}") from None
    except Exception as error:  # an installed package that does not fit another one can raise nearly anything
        raise UserError(f"{purpose} needs the package {name}, which does not work here ({first_line(error)}): pip "
                        f"install --upgrade -r {requirements}") from error
