"""Images, masks and videos as arrays, in and out of files. Nothing here knows the network."""
