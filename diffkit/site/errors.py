"""What goes wrong with a site, in words for its author."""

from __future__ import annotations


class SiteError(Exception):
    "A site that cannot be built, with the cause."
