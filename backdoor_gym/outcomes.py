"""How a repair may end."""

UNTOUCHED, REPAIRED, UNREPAIRABLE = "untouched", "repaired", "unrepairable"
