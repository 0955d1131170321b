"""The folder that a zoo is: written atomically, read by memory map."""
