"""Problems, checkers and published settings: what grades a model that somebody brings."""
