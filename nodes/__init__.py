"""The nodes of the pack, in the order in which an edit uses them."""
