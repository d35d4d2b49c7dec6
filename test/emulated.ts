// Programs of arm64 on this machine: by qemu, with the libraries of the cross compiler.
import { spawnSync } from 'node:child_process'
import { prebuildProblem } from '../scripts/prebuild.mjs'

/** Why they cannot be built and run here, or nothing. */
export function emulationProblem(): string | undefined {
  const problem = prebuildProblem('linux-arm64')
  if (problem) return problem
  if (spawnSync('qemu-aarch64', ['--version']).status !== 0)
    return 'it needs qemu-aarch64 (Debian: qemu-user)'
  return undefined
}

/** The command line that runs a program of arm64. */
export const emulated = (program: string, ...args: string[]): [string, ...string[]] => [
  'qemu-aarch64',
  '-L',
  '/usr/aarch64-linux-gnu',
  program,
  ...args,
]
