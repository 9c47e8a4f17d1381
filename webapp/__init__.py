"""The annotation page: a clip in a browser, with masks drawn, propagated and corrected there."""
