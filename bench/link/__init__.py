"""An emulated slow link, and how accurate it is."""
