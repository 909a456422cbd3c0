"""The models people have: their files and names, turned into our modules and back."""
