// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {
    AccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {IAttributionLog} from "./interfaces/IAttributionLog.sol";
import {IRewardDistributor} from "./interfaces/IRewardDistributor.sol";

/// @title Rewards out of logs' deposits, by a Merkle root of cumulative amounts
contract RewardDistributor is IRewardDistributor, AccessControlDefaultAdminRules, EIP712, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;
    using SafeCast for uint256;

    // One slot: all that a claim reads and writes besides the root and the account's own amount.
    struct Totals {
        uint120 total;
        uint120 claimed;
        bool paused;
    }

    struct Proposal {
        address proposer;
        uint64 validAt; // 0: none is pending
        uint32 epoch; // of the newest proposal, pending or not
    }

    struct LogAccount {
        uint128 deposit; // what is not settled yet
        uint64 settledSize;
    }

    /// @notice May propose epochs.
    bytes32 public constant PUBLISHER_ROLE = keccak256("PUBLISHER_ROLE");
    /// @notice May attest them, unless it may propose too.
    bytes32 public constant ATTESTOR_ROLE = keccak256("ATTESTOR_ROLE");
    /// @notice May veto and pause.
    bytes32 public constant GUARDIAN_ROLE = keccak256("GUARDIAN_ROLE");

    uint256 private constant MAX_ALLOCATIONS = 32;
    bytes32 private constant ALLOCATION_TYPE_HASH =
        keccak256("Allocation(bytes32 logId,uint64 from,uint64 to,uint256 amount)");
    bytes32 private constant ATTESTATION_TYPE_HASH = keccak256(
        "Attestation(uint256 epoch,bytes32 root,uint256 total,Allocation[] allocations)"
        "Allocation(bytes32 logId,uint64 from,uint64 to,uint256 amount)"
    );

    IERC20 private immutable TOKEN;
    IAttributionLog private immutable LOG;
    uint64 private immutable DELAY;
    uint128 private immutable EPOCH_CAP;
    uint8 private immutable THRESHOLD;

    Totals private _totals;
    bytes32 private _root;
    bytes32 private _pendingHash;
    Proposal private _proposal;
    // Written through storage pointers, which the detector does not follow.
    // slither-disable-next-line uninitialized-state
    mapping(bytes32 logId => LogAccount) private _logs;
    mapping(address account => uint256) private _claimed;

    modifier whenNotPaused() {
        if (_totals.paused) revert IsPaused();
        _;
    }

    /// @param token_ what is paid with: a plain ERC-20
    /// @param log where receipts are anchored
    /// @param admin gives and takes the roles, and unpauses; a change of admin takes `delay_` too
    /// @param delay_ seconds between a proposal and its acceptance, at least
    /// @param epochCap_ what one epoch may add to the total, at most
    /// @param threshold_ how many attestations an epoch needs
    constructor(IERC20 token_, IAttributionLog log, address admin, uint64 delay_, uint128 epochCap_, uint8 threshold_)
        AccessControlDefaultAdminRules(SafeCast.toUint48(delay_), admin)
        EIP712("OpenLoRA Rewards", "1")
    {
        if (delay_ == 0 || epochCap_ == 0 || threshold_ == 0) revert ZeroParameter();
        TOKEN = token_;
        LOG = log;
        DELAY = delay_;
        EPOCH_CAP = epochCap_;
        THRESHOLD = threshold_;
    }

    /// @inheritdoc IRewardDistributor
    function deposit(bytes32 logId, uint256 amount) external nonReentrant {
        if (LOG.ownerOf(logId) == address(0)) revert UnknownLog(logId);
        LogAccount storage account = _logs[logId];
        account.deposit = (account.deposit + amount).toUint128();

        uint256 before = TOKEN.balanceOf(address(this));
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
        uint256 received = TOKEN.balanceOf(address(this)) - before;
        if (received != amount) revert WrongAmountReceived(amount, received);
        emit Deposited(logId, msg.sender, amount);
    }

    /// @inheritdoc IRewardDistributor
    function propose(bytes32 root_, uint256 total, Allocation[] calldata allocations)
        external
        onlyRole(PUBLISHER_ROLE)
        whenNotPaused
    {
        Proposal memory newest = _proposal;
        if (newest.validAt != 0) revert EpochPending(newest.epoch);
        _checkAllocations(total, allocations);

        uint32 number = newest.epoch + 1;
        _pendingHash = attestationDigest(number, root_, total, allocations);
        _proposal = Proposal({proposer: msg.sender, validAt: uint64(block.timestamp) + DELAY, epoch: number});
        emit Proposed(number, root_, total, allocations);
    }

    /// @inheritdoc IRewardDistributor
    function veto() external onlyRole(GUARDIAN_ROLE) {
        Proposal memory newest = _proposal;
        if (newest.validAt == 0) revert NoEpochPending();
        _clearPending();
        emit Vetoed(newest.epoch);
    }

    /// @inheritdoc IRewardDistributor
    function pause() external onlyRole(GUARDIAN_ROLE) whenNotPaused {
        _totals.paused = true;
        emit Paused();
    }

    /// @inheritdoc IRewardDistributor
    function unpause() external onlyRole(DEFAULT_ADMIN_ROLE) {
        if (!_totals.paused) revert IsNotPaused();
        _totals.paused = false;
        emit Unpaused();
    }

    /// @inheritdoc IRewardDistributor
    /// @dev A proposal is made only when none is pending, hence after the accept before it: that the delay since the
    /// proposal is over means that the delay since that accept is over too.
    function accept(
        uint256 epoch_,
        bytes32 root_,
        uint256 total,
        Allocation[] calldata allocations,
        bytes[] calldata signatures
    ) external whenNotPaused {
        Proposal memory newest = _proposal;
        if (newest.validAt == 0) revert NoEpochPending();
        bytes32 digest = attestationDigest(epoch_, root_, total, allocations);
        if (digest != _pendingHash) revert NotProposed(digest);
        if (block.timestamp < newest.validAt) revert TooEarly(newest.validAt);
        _checkAttestations(digest, newest.proposer, signatures);
        // Again: a re-org may have taken back an anchor since.
        _checkAllocations(total, allocations);

        _clearPending();
        _totals.total = total.toUint120();
        _root = root_;
        for (uint256 i = 0; i < allocations.length; ++i) {
            Allocation calldata allocation = allocations[i];
            LogAccount storage account = _logs[allocation.logId];
            account.deposit -= allocation.amount.toUint128();
            account.settledSize = allocation.to;
            emit Settled(allocation.logId, allocation.from, allocation.to, allocation.amount);
        }
        emit Accepted(epoch_, root_, total);
    }

    /// @inheritdoc IRewardDistributor
    function claim(address account, uint256 cumulative, bytes32[] calldata proof) external nonReentrant {
        Totals memory sums = _totals;
        if (sums.paused) revert IsPaused();
        bytes32 leaf = keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(this), account, cumulative))));
        if (!MerkleProof.verifyCalldata(proof, _root, leaf)) revert InvalidProof();
        uint256 before = _claimed[account];
        if (cumulative <= before) revert NothingToClaim(cumulative, before);
        uint256 amount = cumulative - before;
        uint256 claimed = sums.claimed + amount;
        if (claimed > sums.total) revert TotalExceeded(claimed, sums.total);

        _claimed[account] = cumulative;
        _totals.claimed = claimed.toUint120();
        emit Claimed(account, amount, cumulative);
        TOKEN.safeTransfer(account, amount);
    }

    /// @inheritdoc IRewardDistributor
    function depositOf(bytes32 logId) external view returns (uint256 amount) {
        return _logs[logId].deposit;
    }

    /// @inheritdoc IRewardDistributor
    function settledSizeOf(bytes32 logId) external view returns (uint64 size) {
        return _logs[logId].settledSize;
    }

    /// @inheritdoc IRewardDistributor
    function claimedOf(address account) external view returns (uint256 amount) {
        return _claimed[account];
    }

    /// @inheritdoc IRewardDistributor
    function totals() external view returns (uint256 total, uint256 claimed, bool paused) {
        Totals memory sums = _totals;
        return (sums.total, sums.claimed, sums.paused);
    }

    /// @inheritdoc IRewardDistributor
    function epoch() external view returns (uint256 number) {
        return _proposal.epoch;
    }

    /// @inheritdoc IRewardDistributor
    function root() external view returns (bytes32 hash) {
        return _root;
    }

    /// @inheritdoc IRewardDistributor
    function pending() external view returns (bytes32 hash, uint64 validAt) {
        return (_pendingHash, _proposal.validAt);
    }

    /// @inheritdoc IRewardDistributor
    function token() external view returns (IERC20) {
        return TOKEN;
    }

    /// @inheritdoc IRewardDistributor
    function attributionLog() external view returns (IAttributionLog) {
        return LOG;
    }

    /// @inheritdoc IRewardDistributor
    function delay() external view returns (uint64) {
        return DELAY;
    }

    /// @inheritdoc IRewardDistributor
    function epochCap() external view returns (uint128) {
        return EPOCH_CAP;
    }

    /// @inheritdoc IRewardDistributor
    function threshold() external view returns (uint8) {
        return THRESHOLD;
    }

    /// @inheritdoc IRewardDistributor
    function attestationDigest(uint256 epoch_, bytes32 root_, uint256 total, Allocation[] calldata allocations)
        public
        view
        returns (bytes32 digest)
    {
        bytes32[] memory hashes = new bytes32[](allocations.length);
        for (uint256 i = 0; i < allocations.length; ++i) {
            hashes[i] = keccak256(abi.encode(ALLOCATION_TYPE_HASH, allocations[i]));
        }
        bytes32 allocationsHash = keccak256(abi.encodePacked(hashes));
        return _hashTypedDataV4(keccak256(abi.encode(ATTESTATION_TYPE_HASH, epoch_, root_, total, allocationsHash)));
    }

    function _clearPending() private {
        _pendingHash = bytes32(0);
        _proposal.validAt = 0;
    }

    /// @dev The head is read again on every call: LOG is immutable and calls nobody.
    function _checkAllocations(uint256 total, Allocation[] calldata allocations) private view {
        if (allocations.length > MAX_ALLOCATIONS) revert TooManyAllocations(allocations.length);
        uint256 sum = 0;
        for (uint256 i = 0; i < allocations.length; ++i) {
            Allocation calldata allocation = allocations[i];
            bytes32 logId = allocation.logId;
            if (i > 0 && logId <= allocations[i - 1].logId) {
                revert AllocationsNotAscending(allocations[i - 1].logId, logId);
            }
            LogAccount memory account = _logs[logId];
            if (allocation.from != account.settledSize) {
                revert WrongStart(logId, allocation.from, account.settledSize);
            }
            if (allocation.to <= allocation.from) revert EmptyRange(logId, allocation.from, allocation.to);
            // slither-disable-next-line unused-return
            (uint64 size,,) = LOG.headOf(logId); // only the size is needed
            if (allocation.to > size) revert NotAnchored(logId, allocation.to, size);
            if (allocation.amount > account.deposit) {
                revert InsufficientDeposit(logId, allocation.amount, account.deposit);
            }
            sum += allocation.amount;
        }
        if (sum > EPOCH_CAP) revert EpochCapExceeded(sum, EPOCH_CAP);
        uint256 expected = _totals.total + sum;
        if (total != expected) revert WrongTotal(total, expected);
        if (total > type(uint120).max) revert TotalTooLarge(total, type(uint120).max);
    }

    function _checkAttestations(bytes32 digest, address proposer, bytes[] calldata signatures) private view {
        if (signatures.length < THRESHOLD) revert TooFewSignatures(signatures.length, THRESHOLD);
        address previous = address(0);
        for (uint256 i = 0; i < signatures.length; ++i) {
            // The third value only explains the fault.
            // slither-disable-next-line unused-return
            (address signer, ECDSA.RecoverError fault,) = ECDSA.tryRecoverCalldata(digest, signatures[i]);
            if (fault != ECDSA.RecoverError.NoError) revert InvalidSignature(i);
            if (signer <= previous) revert SignersNotAscending(previous, signer);
            // The proposer counts even if it gave up PUBLISHER_ROLE since: one stolen key is one key.
            if (!hasRole(ATTESTOR_ROLE, signer) || hasRole(PUBLISHER_ROLE, signer) || signer == proposer) {
                revert NotAttestor(signer);
            }
            previous = signer;
        }
    }
}
