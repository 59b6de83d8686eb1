"""Small networks in the manner of published diffusion code, and the table of rows that the zoo's test runs through."""
