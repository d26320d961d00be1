"""Between the program and whoever types: errors as sentences, files of the user's, the terminal."""
