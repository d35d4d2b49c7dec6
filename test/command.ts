// The command as its users run it: a process of its own.
import { type ChildProcess, spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const main = fileURLToPath(new URL('../dist/lib/cli/main.js', import.meta.url))

export interface Ended {
  code: number | null
  out: string
  err: string
}

/** Starts the command in a folder. */
export function start(
  cwd: string,
  ...args: string[]
): { child: ChildProcess; ended: Promise<Ended> } {
  const env = { ...process.env, P2R_DEVICE: 'cpu', NO_COLOR: '1' }
  const child = spawn(process.execPath, [main, ...args], { cwd, env })
  const ended = new Promise<Ended>((resolve) => {
    let [out, err] = ['', '']
    child.stdout.on('data', (text) => {
      out += text
    })
    child.stderr.on('data', (text) => {
      err += text
    })
    child.on('close', (code) => resolve({ code, out, err }))
  })
  return { child, ended }
}

/** The results that `evaluate` wrote. */
// biome-ignore lint/suspicious/noExplicitAny: what a file holds
export function results(path: string): any[] {
  return readFileSync(path, 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
}
