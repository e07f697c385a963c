"""Foundation potentials, many members at a time: graphs in; energies, forces, virials and invariant features out."""
