"""What a repair did as one self-contained HTML page: no script, and nothing is fetched from anywhere.

The names and facts in it may come from an untrusted model file. All are escaped, and the page's own content security policy
lets nothing run and nothing load.
"""

from .page import render, write_report

__all__ = ["render", "write_report"]
