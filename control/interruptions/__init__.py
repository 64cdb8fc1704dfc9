"""The interruption path: from a message on a customer's queue to a drained node and a replacement that is Ready."""
