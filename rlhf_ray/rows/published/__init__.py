"""Published preference data that name no better and no worse side: what their columns mean, and which layouts are known.

Invariant: importing this package imports none of its modules.
"""
