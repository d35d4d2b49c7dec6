/** What the user asked for cannot be: exit code 2, as for a wrong option. */
export class UsageError extends Error {}
