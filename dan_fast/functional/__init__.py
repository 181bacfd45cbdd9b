"""The fast forms of `dan_fast.reference`, same names and signatures."""
