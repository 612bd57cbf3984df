"""OpenRLHF's flags, so that somebody who writes one is told the key that it is called here."""
