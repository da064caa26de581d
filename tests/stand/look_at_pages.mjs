// Opens the pages of a running server in Chromium and prints, as JSON, what was seen of them.
// Arguments: URL, admin key, folder for screenshots. Packages are those of the working folder.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const require = createRequire(join(process.cwd(), "here.js"));
const { chromium } = require("playwright-core");
const [url, key, folder] = process.argv.slice(2);
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
const seen = { foreign: [], complaints: [], axe: {}, labels: [], streamed: "", ranks: 0, wide: 0 };

async function open(path, size, bypass = false) {
  const context = await browser.newContext({ viewport: size, bypassCSP: bypass });
  const page = await context.newPage();
  page.setDefaultTimeout(120000);
  page.on("request", (one) => {
    if (!one.url().startsWith(url) && !one.url().startsWith("data:")) seen.foreign.push(one.url());
  });
  page.on("console", (one) => { if (one.type() === "error") seen.complaints.push(`${path}: ${one.text()}`); });
  page.on("pageerror", (one) => seen.complaints.push(`${path}: ${one.message}`));
  await page.goto(url + path);
  return page;
}

async function findings(page, name) {
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run());
  seen.axe[name] = found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.target).join(" ")}`);
}

const docs = await open("/docs", { width: 1280, height: 900 });
await docs.waitForSelector(".opblock");
seen.calls = await docs.locator(".opblock").count();
await docs.screenshot({ path: join(folder, "docs.png") });

const page = await open("/console", { width: 1280, height: 1000 });
await page.waitForSelector("#adapter-rows tr");
seen.unkeyed = await page.locator("#adapter-rows button").count();
await page.fill("#key", key);
await page.press("#key", "Enter");
await page.waitForSelector("#adapter-rows button");
seen.state = await page.textContent("#state");
seen.adapters = await page.locator("#adapter-rows tr").count();
seen.stored = await page.evaluate(() => [localStorage.length, sessionStorage.length, document.cookie]);
for (const name of ["hira-imdb", "hira-sst2", "hira-shakespeare", "hira-wiki"]) await page.check(`input[value="${name}"]`).catch(() => {});
await page.click("#try-form button[type=submit]");
await page.waitForFunction(() => document.querySelectorAll("meter").length >= 2 && [...document.querySelectorAll("#answers .card")].every((one) => one.querySelector(".said").textContent !== "..."));
await page.waitForTimeout(4000);
seen.labels = await page.locator(".label-row").allTextContents();
seen.streamed = await page.locator("#answers .said").allTextContents();
await page.selectOption("#audited", "hira-imdb");
await page.click("#audit-form button");
await page.waitForSelector("svg.ranks rect");
seen.ranks = await page.locator("svg.ranks rect").count();
await page.click('button[aria-label="Pin hira-imdb"]');
await page.waitForSelector('button[aria-label="Unpin hira-imdb"]');
await page.click('button[aria-label="Unpin hira-imdb"]');
await page.waitForSelector('button[aria-label="Pin hira-imdb"]');
await page.screenshot({ path: join(folder, "console.png"), fullPage: true });
await page.click('button[aria-label="Versions of hira-imdb"]');
await page.waitForSelector("#versions-rows tr");
const before = await page.locator("#versions-rows tr").count();
await page.screenshot({ path: join(folder, "versions.png") });
const back = page.locator('#versions-rows button:has-text("Roll back")').first();
seen.rolled = await back.count();
if (seen.rolled) {
  await back.click();
  await page.click("#sure-yes");
  await page.waitForFunction((count) => document.querySelectorAll("#versions-rows tr").length > count, before);
}
seen.current = await page.locator('#versions-rows td:has-text("current")').count();
await page.click("#versions button:has-text('Close')");

const checked = await open("/console", { width: 1280, height: 1000 }, true);
await checked.fill("#key", key);
await checked.press("#key", "Enter");
await checked.waitForSelector("#adapter-rows button");
await findings(checked, "wide");
await checked.click('button[aria-label="Versions of hira-imdb"]');
await checked.waitForSelector("#versions-rows tr");
await findings(checked, "versions");
const phone = await open("/console", { width: 375, height: 800 }, true);
await phone.waitForSelector("#adapter-rows tr");
await findings(phone, "phone");
seen.wide = await phone.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
await phone.screenshot({ path: join(folder, "phone.png"), fullPage: true });

await page.focus("#key");
seen.tabbed = [];
for (let step = 0; step < 12; step += 1) {
  await page.keyboard.press("Tab");
  seen.tabbed.push(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent.slice(0, 20)));
}
await browser.close();
console.log(JSON.stringify(seen, null, 1));
