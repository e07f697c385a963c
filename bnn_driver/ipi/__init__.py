"""The room of sockets: i-PI's client, a server for codes that are i-PI clients, and i-PI itself as a process."""
