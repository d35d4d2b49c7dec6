import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const at = (path: string): string => fileURLToPath(new URL(path, import.meta.url))

// Tests use the built package, as its users do.
const shared = {
  resolve: { alias: { 'p2r-kernels': at('./dist/lib/index.js') } },
  test: {
    pool: 'forks' as const,
    maxWorkers: 2,
    maxConcurrency: 2,
    testTimeout: 60_000,
    server: { deps: { external: [/\/dist\//] } },
  },
}

const recordedCases = ['test/twin.test.ts', 'test/arm64.test.ts']

export default defineConfig({
  test: {
    globalSetup: './test/global_setup.ts',
    projects: [
      {
        ...shared,
        test: {
          ...shared.test,
          name: 'package',
          include: ['test/*.test.ts'],
          exclude: recordedCases,
          sequence: { groupOrder: 0 },
        },
      },
      // What test/*.test-d.ts promise of the types; `tsc -p test` in `npm run check` sees them too.
      {
        ...shared,
        test: {
          ...shared.test,
          name: 'types',
          include: [],
          typecheck: {
            enabled: true,
            only: true,
            checker: 'tsc',
            include: ['test/*.test-d.ts'],
            tsconfig: './test/tsconfig.json',
          },
          sequence: { groupOrder: 0 },
        },
      },
      // Last: they run the cases that the operations' tests recorded.
      {
        ...shared,
        test: {
          ...shared.test,
          name: 'twin',
          include: recordedCases,
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
})
