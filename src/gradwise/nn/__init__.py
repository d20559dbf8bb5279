"""Network parts and image measures that public classes of several families contain."""
