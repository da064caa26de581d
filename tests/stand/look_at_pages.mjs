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
const seen = { foreign: [], complaints: [], axe: {}, labels: [], streamed: "", ranks: 0, wide: {}, states: {} };
const SIZES = { wide: { width: 1280, height: 1000 }, phone: { width: 375, height: 800 } };
const KINDS = ["light", "dark"].flatMap((scheme) => Object.keys(SIZES).map((size) => [scheme, size]));
// What /health/ready answers where something is wrong.
const WRONG = {
  starting: "loading and quantizing weights 40 of 146",
  draining: "",
  restarting: "This HTTP process is being restarted; others may be there.",
  worker_lost: "The inference worker is being restarted.",
  worker_silent: "The worker has not been heard for 31 s.",
  worker_stuck: "One step has been running for 301 s.",
};

async function open(path, size, bypass = false, scheme = "light", prepare = async () => {}) {
  const context = await browser.newContext({ viewport: size, bypassCSP: bypass, colorScheme: scheme });
  const page = await context.newPage();
  page.setDefaultTimeout(120000);
  page.on("request", (one) => {
    if (!one.url().startsWith(url) && !one.url().startsWith("data:")) seen.foreign.push(one.url());
  });
  page.on("console", (one) => { if (one.type() === "error" && !bypass) seen.complaints.push(`${path}: ${one.text()}`); });
  page.on("pageerror", (one) => seen.complaints.push(`${path}: ${one.message}`));
  await prepare(page);
  await page.goto(url + path);
  return page;
}

async function findings(page, name) {
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run());
  seen.axe[name] = found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.target).join(" ")}`);
  // The page itself, and the table of adapters, whose buttons nobody looks for beyond its edge.
  seen.wide[name] = await page.evaluate(() => {
    const beyond = [...document.querySelectorAll(".scroll:has(.cards)")].map((one) => one.scrollWidth - one.clientWidth);
    return Math.max(0, document.documentElement.scrollWidth - window.innerWidth, ...beyond);
  });
  await page.screenshot({ path: join(folder, `${name.replaceAll(" ", "-")}.png`), fullPage: name.startsWith("console") });
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
await page.waitForSelector('input[value="hira-sst2"]');
seen.first = await page.locator("#choices input:checked").evaluateAll((boxes) => boxes.map((one) => one.value));
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
await page.waitForSelector("table.ranks td");
seen.ranks = await page.locator("table.ranks td").count();
const pins = ['button[aria-label="Pin hira-imdb"]', 'button[aria-label="Unpin hira-imdb"]'];
if (await page.locator(pins[1]).count()) pins.reverse(); // somebody has pinned it before
for (const [there, then] of [pins, pins.toReversed()]) {
  await page.click(there);
  await page.waitForSelector(then);
}
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

for (const [scheme, size] of KINDS) {
  const kind = `${scheme} ${size}`;
  const reference = await open("/docs", SIZES[size], true, scheme);
  await reference.waitForSelector(".opblock");
  await findings(reference, `docs ${kind}`);
  await reference.locator("#operations-Native-predict_predict_post .opblock-summary-control").click();
  await reference.click(".try-out__btn");
  await reference.click(".execute");
  await reference.waitForSelector(".live-responses-table");
  await reference.locator("section.models h4 button").click();
  await reference.waitForSelector(".json-schema-2020-12-accordion");
  await findings(reference, `docs tried ${kind}`);
  await reference.evaluate(() => scrollTo(0, 0));
  await reference.click(".btn.authorize");
  await reference.waitForSelector(".modal-ux input");
  await findings(reference, `docs key ${kind}`);
  await reference.context().close();

  const checked = await open("/console", SIZES[size], true, scheme);
  await checked.fill("#key", key);
  await checked.press("#key", "Enter");
  await checked.waitForSelector("#adapter-rows button");
  await checked.waitForSelector('input[value="hira-sst2"]');
  await checked.click("#try-form button[type=submit]");
  await checked.waitForSelector("#answers meter");
  await checked.selectOption("#audited", "hira-imdb");
  await checked.click("#audit-form button");
  await checked.waitForSelector("table.ranks td");
  await findings(checked, `console ${kind}`);
  await checked.click('button[aria-label="Versions of hira-imdb"]');
  await checked.waitForSelector("#versions-rows tr");
  await findings(checked, `versions ${kind}`);
  await checked.click("#versions button:has-text('Close')");
  await checked.click('button[aria-label="Remove hira-wiki"]');
  await findings(checked, `sure ${kind}`);
  await checked.keyboard.press("Escape");
  await checked.context().close();
}
for (const [status, detail] of [...Object.entries(WRONG), ["away", ""]]) {
  for (const [scheme, size] of [["light", "wide"], ["dark", "phone"]]) {
    const wrong = await open("/console", SIZES[size], true, scheme, (one) => one.route("**/health/ready", (route) => (
      status === "away" ? route.abort() : route.fulfill({ status: 503, json: { status, detail } }))));
    await wrong.waitForSelector(".state.bad");
    seen.states[status] = await wrong.textContent("#state");
    await findings(wrong, `${status} ${scheme} ${size}`);
    await wrong.context().close();
  }
}

// By the keyboard alone: past the head to the content, one text to two adapters, versions and back.
const keys = await open("/console", SIZES.wide);
await keys.waitForSelector('input[value="hira-sst2"]');
seen.tabbed = [];
async function tabTo(wanted) {
  for (let step = 0; step < 80; step += 1) {
    await keys.keyboard.press("Tab");
    const at = await keys.evaluate(() => {
      const one = document.activeElement;
      return { name: one.id || one.getAttribute("aria-label") || one.value || one.textContent.slice(0, 30), outline: getComputedStyle(one).outlineStyle };
    });
    if (at.outline === "none") seen.complaints.push(`no outline on ${at.name}`);
    if (at.name === wanted) { seen.tabbed.push(at.name); return; }
  }
  seen.complaints.push(`not reached by the keyboard: ${wanted}`);
}
await tabTo("Skip to the content");
await tabTo("key");
await keys.keyboard.type(key);
await keys.keyboard.press("Enter");
await keys.waitForSelector("#adapter-rows button");
await tabTo("Versions of hira-imdb");
await keys.keyboard.press("Enter");
await keys.waitForSelector("#versions-rows tr");
await keys.keyboard.press("Escape");
seen.closed = await keys.evaluate(() => !document.getElementById("versions").open);
seen.returned = await keys.evaluate(() => document.activeElement.getAttribute("aria-label"));
await tabTo("Ask all");
await keys.keyboard.press("Enter");
await keys.waitForSelector("#answers meter");
await tabTo("Audit");
await keys.keyboard.press("Enter");
await keys.waitForSelector("table.ranks td");
await browser.close();
console.log(JSON.stringify(seen, null, 1));
