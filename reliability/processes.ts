// Parts of the reliability run in processes of their own: what ends one of them is a result, not the end of the run.
import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'

export interface Ended {
  /** What it wrote to standard output. */
  out: string
  /** Undefined where it ended well; else how it ended, and the last that it said. */
  failure?: string
}

/** Runs a module of this folder with Node; `log` is a file whose first line says what it is doing. */
export async function runModule(
  module: string,
  args: readonly (string | number)[],
  options: {
    env?: NodeJS.ProcessEnv
    log?: string
    timeoutMs?: number
    nodeArgs?: readonly string[]
    /** The memory that it may have, in KiB; what a hostile size asks for beyond is refused, not taken from others. */
    memory?: number
    /** Where it runs: hostile calls write files of any name. */
    cwd?: string
  } = {},
): Promise<Ended> {
  const { env, log, timeoutMs = 600_000, nodeArgs = [], memory, cwd } = options
  const path = new URL(`./${module}.js`, import.meta.url).pathname
  const limit = memory === undefined ? [] : ['sh', '-c', `ulimit -d ${memory}; exec "$@"`, 'sh']
  const command = [...limit, process.execPath, ...nodeArgs, path, ...args.map(String)]
  const child = spawn(command[0]!, command.slice(1), {
    stdio: ['ignore', 'pipe', 'pipe'],
    ...(cwd && { cwd }),
    ...(env && { env: { ...process.env, ...env } }),
  })
  let [out, errors] = ['', '']
  child.stdout.on('data', (text) => {
    out += text
  })
  child.stderr.on('data', (text) => {
    // The beginning says which error it is.
    if (errors.length < 20_000) errors += text
  })
  const timer = setTimeout(() => child.kill('SIGKILL'), timeoutMs)
  const [code, signal] = await new Promise<[number | null, string | null]>((resolve) =>
    child.on('close', (...ended) => resolve(ended)),
  )
  clearTimeout(timer)
  if (code === 0) return { out }
  const doing = log ? readFileSync(log, 'utf8').split('\n')[0] : ''
  const said = errors
    .split('\n')
    .filter((line) => line.trim())
    .slice(0, 12)
    .join(' | ')
  return { out, failure: `${signal ?? `exit code ${code}`} at ${doing}: ${said}` }
}
