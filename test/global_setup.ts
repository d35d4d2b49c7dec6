import { rmSync } from 'node:fs'
import { cases } from '../scripts/twin.mjs'

/** Once per run: the cases for the kernel twin are those that this run records. */
export default function setup(): void {
  rmSync(cases, { recursive: true, force: true })
}
