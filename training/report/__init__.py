"""What is measured of versions, and the HTML report that shows it."""
