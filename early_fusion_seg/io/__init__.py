"""File input and output: images and masks, atomic writing, downloads, archives."""
