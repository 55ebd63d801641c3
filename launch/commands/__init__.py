"""One verb a file; each module defines `command`, and is imported only when its verb is used."""
