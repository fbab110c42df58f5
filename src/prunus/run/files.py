"""The writers of `prunus.files`, under the name that the demo still imports."""

from prunus.files import write_json, write_text

__all__ = ["write_json", "write_text"]
