/** An error of the command line or its input: exit code 2. */
export class UsageError extends Error {}
