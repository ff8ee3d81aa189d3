"""How fast Guard is: beside other engines, and under load."""
