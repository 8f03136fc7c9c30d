"""Files: images and masks, atomic writing, downloads, archives."""
