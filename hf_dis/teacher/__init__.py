"""Teacher targets: of a teacher that runs beside the student, or stored ones."""
