// What a program pays before its first operation: installing the package, importing it, and opening the
// first device. Each import and device is that of a process of its own.
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { quantiles } from './statistics.js'
import { aligned, milliseconds } from './table.js'

export interface Startup {
  what: string
  value: number
  unit: 'ms' | 'MB'
  /** What it should stay below. */
  bound: number
}

/** Milliseconds to import the package at `entry` and to open its CPU device, each the median. */
export function startupTimes(entry: string, processes: number): Startup[] {
  const program = `
    const start = performance.now()
    const p2r = await import(${JSON.stringify(pathToFileURL(entry).href)})
    const imported = performance.now()
    p2r.openDevice('cpu')
    console.log(imported - start, performance.now() - imported)`
  const times = Array.from({ length: processes }, () =>
    execFileSync(process.execPath, ['--input-type=module', '-e', program], { encoding: 'utf8' })
      .split(' ')
      .map(Number),
  )
  const median = (i: number) => quantiles(times.map((t) => t[i]!)).median
  return [
    { what: 'import', value: median(0), unit: 'ms', bound: 60 },
    { what: "first openDevice('cpu')", value: median(1), unit: 'ms', bound: 30 },
  ]
}

function bytesIn(folder: string): number {
  return readdirSync(folder, { withFileTypes: true }).reduce((sum, entry) => {
    const path = join(folder, entry.name)
    return sum + (entry.isDirectory() ? bytesIn(path) : entry.isFile() ? statSync(path).size : 0)
  }, 0)
}

/**
 * The package of the checkout at `root`, with the prebuilds that are there, installed into an empty folder
 * a second time, so that its dependencies are in npm's cache; and its times there.
 */
export function startup(root: string, processes: number): Startup[] {
  const folder = mkdtempSync(join(tmpdir(), 'p2r-startup-'))
  const npm = (...args: string[]) =>
    execFileSync('npm', args, {
      cwd: folder,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'inherit'],
    })
  try {
    const file = npm('pack', '--silent', '--ignore-scripts', root).trim()
    writeFileSync(join(folder, 'package.json'), '{ "private": true }')
    let seconds = 0
    for (let round = 0; round < 2; round++) {
      rmSync(join(folder, 'node_modules'), { recursive: true, force: true })
      const start = performance.now()
      npm('install', '--prefer-offline', '--ignore-scripts', '--no-audit', '--no-fund', file)
      seconds = performance.now() - start
    }
    const modules = join(folder, 'node_modules')
    return [
      { what: 'packed', value: statSync(join(folder, file)).size / 1e6, unit: 'MB', bound: 20 },
      { what: 'installed, with sharp', value: bytesIn(modules) / 1e6, unit: 'MB', bound: 40 },
      { what: 'install', value: seconds, unit: 'ms', bound: 5000 },
      ...startupTimes(join(modules, 'p2r-kernels/dist/lib/index.js'), processes),
    ]
  } finally {
    rmSync(folder, { recursive: true })
  }
}

export const startupReport = (rows: readonly Startup[]): string =>
  aligned(
    [
      ['', 'measured', 'bound', ''],
      ...rows.map(({ what, value, unit, bound }) => [
        what,
        `${unit === 'ms' ? milliseconds(value) : value.toFixed(1)} ${unit}`,
        `${bound} ${unit}`,
        value < bound ? 'met' : 'missed',
      ]),
    ],
    1,
  )
