"""Result files, whole or not at all."""
