"""The version of this package, in its only place."""

VERSION = "0.1.0"
