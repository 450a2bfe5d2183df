"""How fast the draft model decodes, compared with other libraries and with the memory bandwidth."""
