"""How far two ways of running one model lie apart: what each gives every token, and where they part."""
