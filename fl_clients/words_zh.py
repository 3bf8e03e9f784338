"""任务说明的中文文本（plain_words.py）。The Chinese words of a job."""

from fl_clients.contract import Receiver, ReleaseName, Role
from fl_clients.job_facts import JobFacts, Side, epsilon_text, short_fingerprint
from fl_clients.policy import Objection

_ROLE: dict[Role, str] = {
    "bank": "银行，标签持有方",
    "pboc": "人民银行征信，特征持有方",
    "public_credit": "公共信用平台，特征持有方",
}
_WHO: dict[Receiver, str] = {"coordinator": "协调方", "banks": "各银行", "owners": "各特征持有方"}
_KIND = {"numeric": "数值", "categorical": "类别"}

WHAT = {
    "kind of job": "任务类型",
    "purpose": "用途",
    "scenario": "场景",
    "label definition (SHA-256)": "标签定义（SHA-256）",
    "column in this scenario": "该场景下的字段",
    "column without a level": "未定敏感级别的字段",
    "sensitivity": "敏感级别",
    "banks in the job": "参与银行数",
    "banks needed to go on (least_banks)": "继续运行所需的银行数（least_banks）",
    "least cell (least_count)": "最小单元行数（least_count）",
    "forward noise": "前向噪声",
    "rounds": "训练轮数",
    "uses": "使用次数",
    "days of validity": "有效天数",
    "days of retention": "模型保留天数",
    "banks per enterprise": "同一企业涉及的银行数",
    "delta": "delta",
    "score openings of one enterprise": "单个企业得分的揭示次数",
    "epsilon of all uses": "全部使用次数合计的 epsilon",
    "epsilon in all": "累计 epsilon",
}
"""policy.Objection.what -> 中文"""


def lines(facts: JobFacts) -> tuple[str, ...]:
    """任务的全部说明，逐行。"""
    return (*_who(facts), *_columns(facts), *_flows(facts), *_cost(facts), *_terms(facts), *_leaks(facts))


def objections(found: tuple[Objection, ...]) -> tuple[str, ...]:
    """策略对任务的异议，逐行。"""
    if not found:
        return ("本机构策略没有异议。",)
    shown = (f"  - {WHAT[item.what]}：申请值 {_value(item.value)}，允许值 {_value(item.limit)}" for item in found)
    end = "审批人不能越过策略：请协调方修改合约，或由管理员修改策略，或拒绝该任务。"
    return (f"本机构策略有 {len(found)} 项异议，不能批准：", *shown, end)


_VALUES = (
    ("a deployed job only", "仅限正式任务"),
    ("a simulation only", "仅限模拟任务"),
    ("a deployed job", "正式任务"),
    ("a simulation", "模拟任务"),
    ("at most level ", "不高于 "),
    ("classified columns", "已定级的字段"),
    ("at least ", "不少于 "),
    (" over all jobs", "（所有任务合计）"),
    ("at most ", "不超过 "),
    ("up to ", "最多 "),
    (" with the ", "（其中已消耗 "),
    (" already spent", "）"),
    ("infinite", "无穷大"),
    ("none yet", "尚未设置"),
    (" level ", "，级别 "),
)


def _value(text: str) -> str:
    """Figures and names stay; the few words around them are translated."""
    if text.startswith("'") and text != "none yet":
        return text
    for english, chinese in _VALUES:
        text = text.replace(english, chinese)
    return text


def _who(facts: JobFacts) -> list[str]:
    contract = facts.contract
    kind = "模拟任务" if contract.simulation else "正式任务"
    out = [
        f"任务 {contract.job}，合约 {contract.hash.hex()[:16]}：{kind}。",
        f"发起：协调方，其密钥指纹为 {short_fingerprint(contract.coordinator_identity)}；请通过电话核对。",
        f"用途：{contract.purpose}。场景：{contract.scenario}。",
        f"模型预测的内容：{contract.label.definition}（SHA-256 {contract.label.hash[:16]}）。",
        f"参与方（{len(contract.parties)}）：",
    ]
    for party in contract.parties:
        you = "，即本机构" if party == facts.terms else ""
        out.append(f"  - {party.name}（{_ROLE[party.role]}{you}），密钥指纹 {short_fingerprint(party.identity)}")
    return out


def _columns(facts: JobFacts) -> list[str]:
    out = [f"使用本机构 {len(facts.columns)} 个字段，逐行数据只在本机构的保险库内处理："]
    for column in facts.columns:
        level = "未定级" if column.level is None else f"级别 {column.level}"
        personal = "，个人信息" if column.personal else ""
        name = f"{column.zh} {column.name}" if column.zh else column.name
        out.append(f"  - {name}（{_KIND[column.kind]}，{level}{personal}）")
    if facts.side == "bank":
        out.append("同时使用本机构每个客户的标签（定义见上）。")
    out.append(f"只有对该用途的授权当前有效的企业才参与，本机构最多 {facts.terms.most_enterprises} 家。")
    return out


def _flows(facts: JobFacts) -> list[str]:
    out = ["离开本机构的内容："]
    for release, receivers in facts.leaves():
        out.append(f"  - 给{'、'.join(_WHO[one] for one in receivers)}：{_leaving(facts, release)}")
    out.append("  - 给传递消息者（包括协调方）：消息的大小和时间；内容是密封的")
    out.append("本机构收到的内容：")
    out.extend(f"  - {_arriving(facts, release)}" for release in facts.arrives())
    out.append("原始记录、标签和特征从不离开本机构；协议中没有任何消息可以携带它们。")
    return out


def _noised(facts: JobFacts) -> str:
    return "精确值，不加噪声" if facts.contract.privacy.epsilon is None else "加有满足 epsilon 的噪声"


def _leaving(facts: JobFacts, release: ReleaseName) -> str:
    contract, noised = facts.contract, _noised(facts)
    both: dict[ReleaseName, str] = {
        "row_counts": "本机构的行数或取整后的名单大小，以及本任务的公钥",
        "model_digest": "本机构模型部分的加盐哈希值",
    }
    own: dict[Side, dict[ReleaseName, str]] = {
        "bank": {
            "alignment": f"对方的企业中哪些是本机构客户；本机构名单大小，向上取整到 {contract.alignment.bucket} 的倍数",
            "bank_sums": f"银行字段和步长搜索的计数与总和，所有银行合计，{noised}",
            "owner_sums": f"残差在各特征持有方自己分箱内的总和，所有银行合计，{noised}；步长、基准违约率",
            "score_histogram": f"按标签统计的得分直方图，所有银行合计，{noised}",
        },
        "owner": {
            "alignment": "对方的客户中哪些是本机构有记录的；本机构名单大小，"
            f"向上取整到 {contract.alignment.bucket} 的倍数",
            "directions": f"在 {contract.model.rounds} 轮训练的每一轮中，对方自己客户的得分变化量，"
            f"所有特征持有方合计，加 {contract.model.forward_noise:g} 倍标准差的噪声；本机构的分箱数",
            "scores": "对方被评分的客户的得分，所有特征持有方合计的精确值",
        },
    }
    return both.get(release) or own[facts.side][release]


def _arriving(facts: JobFacts, release: ReleaseName) -> str:
    contract, noised = facts.contract, _noised(facts)
    mates = "本机构客户中哪些在特征持有方有记录" if facts.side == "bank" else "本机构的企业中哪些是某银行的客户"
    texts: dict[ReleaseName, str] = {
        "row_counts": "各方的行数和公钥",
        "alignment": mates,
        "bank_sums": f"银行字段的计数与总和，所有银行合计，{noised}，以及模型的银行部分",
        "owner_sums": f"残差在本机构自己分箱内的总和，所有银行合计，{noised}；步长、基准违约率",
        "directions": f"本机构客户得分变化量的加噪总和，所有特征持有方合计，共 {contract.model.rounds} 轮",
        "scores": "本机构被评分客户的精确得分，所有特征持有方合计",
        "score_histogram": f"所有银行合计的得分直方图，{noised}",
    }
    return texts[release]


def _cost(facts: JobFacts) -> list[str]:
    privacy, uses = facts.contract.privacy, facts.contract.uses
    limit = "无上限（模拟）" if facts.limit is None else f"{facts.limit:g}"
    if facts.side == "owner":
        epsilon = "没有 epsilon" if privacy.epsilon is None else f"epsilon 为 {privacy.epsilon:g}"
        return [
            f"Epsilon：每次使用中，银行记录的{epsilon}。本机构的特征没有 epsilon 保护：计数的是企业得分被揭示的次数。",
            f"单个企业得分的揭示次数：本任务最多 {facts.openings} 次，所有任务合计上限 {facts.most_openings} 次。",
        ]
    if privacy.epsilon is None:
        return ["Epsilon：无。总和是精确值；某个分箱内标签全部相同时，标签即被泄露。仅限模拟。"]
    left = limit if facts.left is None else f"{facts.left:.3g}"
    return [
        f"申请的 epsilon：每次使用 {privacy.epsilon:g}，共 {uses} 次，在本机构 delta {facts.delta:.3g} 下合计 "
        f"{epsilon_text(facts.asked, '无穷大')}；保护单位是一家企业，最多涉及 {privacy.banks_per_enterprise} 家银行。",
        f"已消耗的 epsilon：{epsilon_text(facts.spent, '无穷大')}；剩余：{left}，上限 {limit}；本任务之后约为 "
        f"{epsilon_text(facts.after, '无穷大')}（每次使用开始时由隐私账本精确合成）。",
    ]


def _terms(facts: JobFacts) -> list[str]:
    contract = facts.contract
    model, he = contract.model, contract.he
    return [
        f"可运行 {contract.uses} 次，有效期 {contract.not_before:%Y-%m-%d %H:%M} 至 {contract.expires:%Y-%m-%d %H:%M}"
        f"（UTC）；到期后模型可再保留 {contract.retention_days} 天。每次使用结束时销毁密钥、掩码和对齐结果。",
        f"模型：可加评分卡，{model.rounds} 轮，银行字段最多 {model.max_bins_bank} 箱，特征持有方字段最多 "
        f"{model.max_bins_owner} 箱；少于 {model.least_count} 行的类别合并。",
        f"加密：安全强度不低于 {he.security_bits} 位，噪声淹没不低于 {he.flooding_bits} 位；更弱的一律拒绝。",
        f"银行掉线时：剩余银行不少于 {contract.least_banks} 家则继续，预先支付了 "
        f"{contract.privacy.spare_attempts} 次重做。",
    ]


def _leaks(facts: JobFacts) -> list[str]:
    leaks = [*_leaks_of_numbers(facts), *(_leaks_of_bank(facts) if facts.side == "bank" else _leaks_of_owner(facts))]
    leaks += [
        "成员关系：对齐本身就使双方知道彼此共有哪些企业。",
        "假定各方都遵守协议。协调方若对所有银行同样地篡改一个总和，不会被发现：得到的模型是错的。",
        "加密或加噪的结果不是匿名化数据，仍受授权和用途约束。",
    ]
    if facts.contract.alignment.one_sided:
        leaks.append("允许单向对齐：特征持有方公布其名单的带密钥值，对多家银行相同，银行之间可以互相比对。")
    if any(column.personal for column in facts.columns):
        leaks.append("包含个人信息字段：需要取得个人的单独同意（《个人信息保护法》第 23 条）。")
    return [f"已知的泄露（{len(leaks)}）：", *(f"  - {leak}" for leak in leaks)]


def _leaks_of_numbers(facts: JobFacts) -> list[str]:
    banks, leaks = len(facts.contract.banks), []
    if banks == 1:
        leaks.append("只有一家银行：所有“银行合计”都是这家银行自己的数。")
    if banks == 2:
        leaks.append("只有两家银行：每家都可以从总和中减去自己，得到另一家的数；要保密至少需要三家。")
    if facts.only_owner:
        leaks.append("只有一个特征持有方：银行看到它的得分，只差一个常数；有第二个特征持有方才能掩盖。")
    return leaks


def _leaks_of_bank(facts: JobFacts) -> list[str]:
    banks, colluding = len(facts.contract.banks), facts.colluding
    leaks = [
        f"合谋：其余所有银行联合可以减去自己的部分；噪声能抵御 {banks} 家银行中的 {colluding} 家合谋。",
        "某个分箱或某个特征持有方的客户全部是本机构客户时，其总和就是本机构的数（带全部噪声）。",
        "恶意的特征持有方若用 0 和 1 以外的数计算，可以透过噪声读出单个残差，或把本机构当作本任务密钥的解密工具。",
        "若按“替换一家企业”而不是“去掉一家企业”衡量，epsilon 加倍。",
    ]
    if facts.contract.privacy.epsilon is None:
        leaks.append("没有 epsilon：数据量小时，特征持有方可以确定地得知许多标签。")
    return leaks


def _leaks_of_owner(facts: JobFacts) -> list[str]:
    return [
        "最终得分是精确值：它向银行透露每家被评分企业的一些信息，客户多的银行可以用自己已知的数据去回归。"
        "这正是得分的用途；靠授权、用途限定和少量评分来约束。",
        "其他特征持有方都没有记录的企业：银行得到本机构对它的得分，只差一个常数。",
        f"训练中的噪声是经验做法：{facts.contract.model.rounds} 轮中每轮都给出一个加噪总和，银行可以在客户之间取平均。",
        "恶意的银行若使用伪造的公钥，或在密文中加入过大的噪声，可以读出本机构分箱中 1 的位置。",
        "银行会知道本机构的分箱数，以及它的哪些客户在本机构没有记录。",
    ]
